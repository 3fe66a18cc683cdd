"""The sources of checkpoints: folders, Python packages, the Hugging Face Hub, MLflow's registry, object storage."""
