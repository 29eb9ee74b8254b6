/* calibrate READS: reads the PIT's channel 2 so often, as Linux does in a calibration of the TSC, which is the better
 * the more often it can.  Spec: Intel 8254 datasheet, counter latch command. */
#include <stdlib.h>
#include <sys/io.h>

int main(int argc, char **argv)
{
    if (argc != 2 || ioperm(0x40, 4, 1))
        return 1;
    outb(0xb0, 0x43); /* channel 2, low byte and high byte, mode 0 */
    outb(0xff, 0x42);
    outb(0xff, 0x42);
    for (int left = atoi(argv[1]); left; left--) {
        outb(0x80, 0x43); /* latch */
        inb(0x42);
        inb(0x42);
    }
    return 0;
}
