"""A chatbot: an actor for each conversation, two small models for all of them."""
