"""What each stage trains: its loss and its pictures."""
