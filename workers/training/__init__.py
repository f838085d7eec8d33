"""Fine-tuning: data in, xtuner run, progress out, the tuned model compared and registered."""
