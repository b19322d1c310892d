"""What is used of vLLM beyond its public interface: one table of it, and the releases that were tested."""
