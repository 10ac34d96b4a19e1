"""Memory and wake-ups that the front and the workers share: arena, weights, doorbell."""
