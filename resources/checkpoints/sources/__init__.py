"""Where checkpoints come from: folders, Python packages, the Hugging Face Hub, MLflow's registry, object storage."""
