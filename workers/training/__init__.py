"""Fine-tuning: from a dataset to a tuned model's folder. Nothing here imports a model library but the trainer's own modules."""
