"""What happens at each batch, step and window, whoever the loop belongs to; imports no Lightning."""
