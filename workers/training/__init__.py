"""Fine-tunes: from rows and images to a tuned model in its official folder."""
