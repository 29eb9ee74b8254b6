# L1's init, second half, on this machine's root: run the job, pass its output on, report its exit status.
B=/.l1/busybox
for dir in /run /dev/shm; do $B mkdir -p $dir; $B mount -t tmpfs -o mode=1777 tmpfs $dir; done
$B mkdir -p /dev/pts; $B mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
$B ln -sf /proc/self/fd /dev/fd
$B ln -sf fd/0 /dev/stdin; $B ln -sf fd/1 /dev/stdout; $B ln -sf fd/2 /dev/stderr
$B mount -t cgroup2 cgroup2 /sys/fs/cgroup
$B mount -t securityfs securityfs /sys/kernel/security
$B mount -t debugfs debugfs /sys/kernel/debug
$B chmod 666 /dev/kvm           # as a kvm group would: an ordinary user is tested by setpriv
$B hostname l1; $B ifconfig lo 127.0.0.1 up; ulimit -n 65536

$B mkfifo /run/.l1-stdout /run/.l1-stderr
$B cat < /run/.l1-stdout > "$PORT_stdout" & out=$!
$B cat < /run/.l1-stderr > "$PORT_stderr" & err=$!
$B setsid /bin/sh -c '. /.l1/job; payload' < /dev/null > /run/.l1-stdout 2> /run/.l1-stderr 9<&- &
job=$!
(
    while read -r order <&9; do
        case $order in
        SIGNAL*) $B kill "-${order#SIGNAL }" -$job ;;
        DUMP)   # to the console: where in the kernel each thread sleeps, and last which processes there are
            for p in /proc/[0-9]*; do
                [ -n "$($B tr -d '\000' < $p/cmdline)" ] || continue
                for t in $p/task/*; do echo "== $t $($B cat $t/comm)"; $B cat $t/stack; done
            done
            $B ps -o pid,ppid,stat,args | $B grep -v '\[.*\]$' ;;
        esac
    done
) 2> /dev/null &
wait $job; status=$?
( $B sleep 1; $B kill $out $err ) 2> /dev/null &     # a daemon left behind may hold the pipes open
wait $out; wait $err
printf '\000L1-END\000' > "$PORT_stdout"; printf '\000L1-END\000' > "$PORT_stderr"
$B sync
echo "EXIT $status" >&9
$B sleep 1000
