"""The processes in which generated programs run; standard library only.

`launch` makes them, `jail` takes their powers away, `examiner` runs the assertions, `program` the
generated text, and `wire` carries plain values between the last two. `tasks.code_execution` is the
way in from outside.
"""
