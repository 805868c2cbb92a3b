"""How one array is stored in few bits: codecs, their groups, and their random bits."""
