"""Small models that ship with the project: what they know (`facts`), what they read (`corpus`), how they are made
(`train`)."""
