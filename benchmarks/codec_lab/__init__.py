"""Which codes lose least of an optimizer's state, per byte? Streams and figures."""
