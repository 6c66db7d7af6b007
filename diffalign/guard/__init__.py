"""The guard of a run: does training still do what it is for, or does it only please its reward?"""
