"""What the sessions of noxfile.py share. No part of any package."""
