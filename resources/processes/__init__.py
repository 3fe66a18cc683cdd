"""Child processes, with limits for their time, memory and environment variables."""
