"""The wire's objects, one file per resource; what they say is OpenAI's specification 2.3.0."""
