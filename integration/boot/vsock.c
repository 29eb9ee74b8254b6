/* vsock connect|listen PORT: standard input to the host or to who calls from there, then the answer to standard
 * output, both to their end.  A guest's program for test_virtio_vsock.py; see vsock(7). */

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

static void copy(int from, int to)
{
	static char buffer[65536];
	ssize_t count;

	while ((count = read(from, buffer, sizeof buffer)) > 0)
		for (ssize_t done = 0, more; done < count; done += more)
			if ((more = write(to, buffer + done, count - done)) <= 0)
				exit(2);
	if (count < 0)
		exit(3);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 1;
	int listens = !strcmp(argv[1], "listen"), s = socket(AF_VSOCK, SOCK_STREAM, 0);
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK,
		.svm_cid = listens ? VMADDR_CID_ANY : VMADDR_CID_HOST,
		.svm_port = strtoul(argv[2], NULL, 10),
	};

	if (listens) {
		if (bind(s, (struct sockaddr *)&address, sizeof address) || listen(s, 1))
			return 4;
		s = accept(s, NULL, NULL);
	} else if (connect(s, (struct sockaddr *)&address, sizeof address)) {
		return 5;
	}
	if (s < 0)
		return 6;
	copy(0, s);
	shutdown(s, SHUT_WR);
	copy(s, 1);
	return 0;
}
