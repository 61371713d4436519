-- Counts one failure of KEYS[1] in a window of ARGV[1] seconds, which the first begins. Gives the count, and the seconds left.
local count = redis.call('INCRBY', KEYS[1], 1)
if count == 1 then
  redis.call('EXPIRE', KEYS[1], ARGV[1])
end
return {count, redis.call('TTL', KEYS[1])}
