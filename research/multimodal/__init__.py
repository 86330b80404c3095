"""Models that read images beside text: one machine whose parts are exchanged."""
