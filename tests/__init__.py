"""A package, because bitsandbytes installs one of the same name, which would hide this folder."""
