"""Optional parts of private training, loaded if a config asks for them. Must not be imported by privacy or gradients."""
