"""Tables and pictures of the records under results/."""
