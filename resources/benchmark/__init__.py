"""How fast engines are, which of them is best, and why."""
