"""The command `lightrft`. It is outside the namespace `lightrft`, which a clone of LightRFT on sys.path hides.

main.py          the commands, each in its file: doctor.py, registered.py, config.py, checkpoint.py, convert.py, adopt.py
errors.py        how commands fail
output.py        tables and JSON
requirements.py  whether the requirements of installed packages are met
imports.py       whether strategies and engines can be imported
adoption.py      makes every Python startup in an environment install the finder
finder.py        finds `lightrft` in this project's packages and in a clone
"""
