"""How small teachers are made, the demonstration's and others: data, parts, training, how well they obey."""
