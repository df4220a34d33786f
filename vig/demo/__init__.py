"""The miniature: scenes, a tiny checkpoint, and the whole road of VIG on them in minutes."""
