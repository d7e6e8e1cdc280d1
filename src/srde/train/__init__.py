"""Training: arguments, losses, schedules, the trainer, and one run from flags to adapter."""
