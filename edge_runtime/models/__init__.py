"""Models from elsewhere: ordinary torch modules as specs."""
