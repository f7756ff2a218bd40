"""``wireframe view``: one offline page to look at scenes, their truth and their predictions."""
