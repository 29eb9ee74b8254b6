# String instructions: out to a device, in from a device, in words of which a device has one half and the
# test the other, and out to the test.
        .code16
        .include "report.inc"
        .set BUFFER, 0x2000
start:  cld
        mov     $text, %si
        mov     $13, %cx
        mov     $DEVICE, %dx
        rep outsb
        mov     $BUFFER, %di
        mov     $7, %cx
        mov     $DEVICE, %dx
        rep insb
        mov     $3, %cx
        mov     $REPORT - 1, %dx        # the device's last port and the test's first
        rep insw
        mov     $BUFFER, %si
        mov     $13, %cx
        mov     $REPORT, %dx
        rep outsb
        done
text:   .ascii  "Hello, world!"
