/* The input of a libFuzzer target, byte by byte.  Without libFuzzer (-DREPLAY): main() runs each input of a file, one
 * a line in hexadecimal. */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(what) ((what) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what), abort()))

static const uint8_t *input, *input_end;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint8_t u8(void)
{
    return input < input_end ? *input++ : 0;
}

static uint64_t bits(int bytes)
{
    uint64_t value = 0;
    while (bytes--)
        value = value << 8 | u8();
    return value;
}

#ifdef REPLAY
#define INPUT_MAX 4096
int main(int argc, char **argv)
{
    uint8_t data[INPUT_MAX];
    char line[2 * INPUT_MAX + 2];
    int inputs = 0;
    FILE *file = argc == 2 ? fopen(argv[1], "r") : NULL;
    REQUIRE(file);
    while (fgets(line, sizeof line, file)) {
        size_t size = strcspn(line, "\n") / 2;
        for (size_t i = 0; i < size; i++)
            REQUIRE(sscanf(&line[2 * i], "%2hhx", &data[i]) == 1);
        uint8_t *exact = malloc(size); /* so that reading past it is seen */
        memcpy(exact, data, size);
        LLVMFuzzerTestOneInput(exact, size);
        free(exact);
        inputs++;
    }
    printf("%d inputs\n", inputs);
    return 0;
}
#endif

#endif
