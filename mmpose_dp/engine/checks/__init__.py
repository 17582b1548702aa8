"""What is checked at every private step. Must not change what the step gives."""
