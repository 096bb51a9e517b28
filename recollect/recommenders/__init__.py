"""Who ranks items for a user: closed-form, sequential, text and language-model recommenders behind one protocol."""
