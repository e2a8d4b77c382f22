"""lowtide inside other libraries. Upper floor: each package here says at its top what it needs installed."""
