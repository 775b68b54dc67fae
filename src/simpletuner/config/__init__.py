"""What the user asked for: one declaration per option, read from file, environment and flags."""
