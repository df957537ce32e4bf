"""How nano, the embedded model, was made: its training, the gates that it had to pass, and the reports on it."""
