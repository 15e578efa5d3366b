"""The search room: from images to embeddings, to an index, to answers and a page that shows them."""
