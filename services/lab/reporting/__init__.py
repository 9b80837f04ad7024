"""Tables, JSON figures and charts."""
