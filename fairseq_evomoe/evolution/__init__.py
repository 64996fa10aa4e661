"""How one expert becomes many, and when."""
