"""Optional parts of private training, and what tools and statements add. Must not be imported by privacy or gradients."""
