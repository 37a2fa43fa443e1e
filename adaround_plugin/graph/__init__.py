"""Graphs: what a host tells about its weighted nodes, and the two streams of activations through them."""
