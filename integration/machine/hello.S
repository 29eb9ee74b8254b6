# Says hello and powers itself off.
        .include "pc.inc"
start:  say     "hello"
        poweroff
