"""Memory whose addresses are reserved once and whose physical pages come and go beneath them."""
