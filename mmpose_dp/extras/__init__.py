"""What a private training can do without: loaded when a config asks for it. Must not be imported by privacy or gradients."""
