"""What the site modules share: their settings, and Parsl providers that clusters cannot upset."""
