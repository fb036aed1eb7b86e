"""Prepared data at a URL: files in object stores and on web servers, read through a cache on this machine."""
