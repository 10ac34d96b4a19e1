"""Faces in pictures: the three networks of MTCNN as a cascade, for many users at once."""
