"""Mixture of experts: routers, dispatch, experts, and the layers made of them."""
