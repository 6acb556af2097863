"""What a network scores."""
