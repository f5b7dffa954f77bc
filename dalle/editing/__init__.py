"""Pictures of which a part is drawn anew."""
