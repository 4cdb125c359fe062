"""Generated data with ground truth.

A world makes text (or pictures) whose right answer is known because the generator made it. Every world is
seeded, splits its problems by what they are instead of by when they were drawn, and says how often a guess
is right. Worlds import nothing else of the package.
"""
